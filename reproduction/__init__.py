"""The paper's experiment, model by model and value by value, held to what was measured and printed."""
