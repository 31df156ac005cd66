"""Speed and memory: what the probe, `clean` and the statistics cost, beside what they replace.

python -m gazeguard.bench.speed --out runs/speed.json [--quick]
"""
