"""Pure array maths: entropy, bimodality. No model, no data set."""
