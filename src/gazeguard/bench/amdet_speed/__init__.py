"""What a scan of a text encoder costs, beside the public implementation's way of working.

python -m gazeguard.bench.amdet_speed --out bench/results/amdet_speed.json [--quick]
"""
