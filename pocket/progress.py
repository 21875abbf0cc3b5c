"""How far a training has come, in one line that is written over."""

from collections.abc import Callable


def tell(stage: str) -> Callable[[str, float, float], None]:
    """What `fit` calls as `progress`."""

    def progress(_: str, done: float, total: float) -> None:
        print(f"\r{stage} {done:,.0f}/{total:,.0f}", end="" if done < total else "\n", flush=True)

    return progress
