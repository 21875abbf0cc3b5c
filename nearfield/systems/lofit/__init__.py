"""LoFiT: a task is learnt as offsets of the outputs of few attention heads."""
