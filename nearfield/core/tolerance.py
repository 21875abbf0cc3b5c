"""How far a fast result may lie from the reference, by dtype: one table for every operator.

An error is rms(result - reference) / rms(reference). Rounding noise of a dot product grows with the square
root of its length, so the figures are some ten to fifty units of the last place of the dtype.
"""

OUTPUT = {"float64": 1e-12, "float32": 2e-6, "float16": 1.5e-3, "bfloat16": 1e-2}
GRADIENT = {"float64": 1e-11, "float32": 5e-6, "float16": 3e-3, "bfloat16": 2e-2}


def tolerance(dtype: object, *, gradient: bool = False) -> float:
    """Largest allowed relative rms error of an output, or of a gradient, computed in `dtype`."""
    name = str(dtype).removeprefix("torch.")
    table = GRADIENT if gradient else OUTPUT
    if name not in table:
        raise ValueError(f"dtype={dtype} has no tolerance. Those that have: {', '.join(table)}.")
    return table[name]
