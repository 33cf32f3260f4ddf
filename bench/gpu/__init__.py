"""Everything that needs a GPU, in one program: checks, tunes and times the package and writes one JSON.

python -m bench.gpu --out results/gpu --seconds 540
"""
