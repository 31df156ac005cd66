"""The attack lab: worlds, tiny models, triggers and poisoned fine-tunes made here, truth known."""
