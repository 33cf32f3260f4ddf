"""Everything that needs a GPU, in one program: checks, times and tunes the package in nine minutes, without network.

python -m bench.gpu --out results/gpu [--seconds 540] [--profile] [--wheels DIR] [--dry]
python -m bench.gpu table rows.jsonl --out kernels/mmpeft_kernels/tuned
"""
