"""What `clean` does at scale: rows/s, memory, what Ray costs and brings, what a kill changes.

python -m gazeguard.bench.scale --out bench/results/scale.json [--quick]
"""
