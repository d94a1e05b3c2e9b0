"""Where the time of a training run goes: language model, store, steps, evals, logging."""
