import sys

from bench.gpu.repository import make_importable

if __name__ == "__main__":
    make_importable()
    if sys.argv[1:2] == ["table"]:
        from bench.gpu.tuned import main
    else:
        from bench.gpu.command import main
    sys.exit(main(sys.argv[1 + (sys.argv[1:2] == ["table"]) :]))
