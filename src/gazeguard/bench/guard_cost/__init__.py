"""What the guard costs: clean requests beside unguarded ones, flagged ones, the public way.

python -m gazeguard.bench.guard_cost --out bench/results/guard_cost.json [--quick]
"""
