import sys

from bench.gpu.repository import make_importable

if __name__ == "__main__":
    make_importable()
    word, arguments = sys.argv[1:2], sys.argv[2:]
    if word == ["table"]:
        from bench.gpu.tuned import main
    elif word == ["rates"]:
        from bench.gpu.rates import main
    else:
        from bench.gpu.command import main

        arguments = sys.argv[1:]
    sys.exit(main(arguments))
