"""What the arms of a study differ in, and what they share.

Owns how differences are found, and the words for what is held fixed and what cannot be. Must not know files, or how arms are
made or trained.
"""

from typing import Any

__all__ = ["differences", "held"]

NAMED = 4  # arms that are named in a sentence
# What follows from an experiment, of which no field says it, and what it is called.
FOLLOWING = {
    "epochs": "how often each window is seen",
    "steps": "steps",
    "tokens": "training tokens",
    "parameters": "parameters",
}

Arm = dict[str, Any]  # one of a summary's


def differences(old: Any, new: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted path → the two values, where two JSON values differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {path: (old, new)} if old != new else {}
    found = dict[str, tuple[Any, Any]]()
    for name in {**old, **new}:
        found |= differences(old.get(name), new.get(name), f"{path}.{name}".lstrip("."))
    return found


def held(arms: list[Arm]) -> list[str]:
    """What all arms share whatever they differ in, and what could not be held fixed: a sentence each.

    Args:
      arms: as in a summary, the base arm first.
    """
    if published := [arm["id"] for arm in arms if "published" in arm]:
        trained = [arm for arm in arms if "published" not in arm]
        said = [f"Not held fixed: what was trained on, and how. As published: {_listed(published)}."]
        return said + (held(trained) if len(trained) > 1 else [])
    base = arms[0]
    others = [arm["id"] for arm in arms if arm["pool"] != base["pool"]]
    alike = len({arm["epochs"] for arm in arms}) == 1  # else it stands in the next sentence
    each = f", each {'once' if base['epochs'] == 1 else str(base['epochs']) + ' times'}" if alike else ""
    held_in = f", {base['examples']:,} conversations with {base['learnt']:,} learnt ids" if "examples" in base else ""
    pool = f"{base['windows']:,} windows (sha256 `{base['pool'][:12]}`{held_in}){each}"
    said = _origins(arms)
    if others:
        said += [f"Not held fixed: the windows. {base['id']} was fed {pool}; {_listed(others)}: other windows."]
    else:
        said += [f"Held fixed: all {len(arms)} arms were fed the same {pool}."]
    loose = []
    for name, called in FOLLOWING.items():
        of: dict[int, list[str]] = {}
        for arm in arms:
            of.setdefault(arm[name], []).append(arm["id"])
        if len(of) > 1:
            rest = [f"{_listed(names)} {value:,}" for value, names in of.items() if value != base[name]]
            loose.append(f"{called} ({base[name]:,}; {'; '.join(rest)})")
    if loose:
        said.append(f"Not held fixed, since it follows from the factors: {', '.join(loose)}.")
    else:
        said.append(f"Held fixed: {', '.join(FOLLOWING.values())}.")
    return said


def _origins(arms: list[Arm]) -> list[str]:
    """What arms begin with that have a parent."""
    of: dict[str, list[str]] = {}
    for arm in arms:
        origin = arm.get("origin")
        name = "no parent" if origin is None else _checkpoint(origin)
        of.setdefault(name, []).append(arm["id"])
    if list(of) == ["no parent"]:
        return []
    if len(of) == 1:
        return [f"Held fixed: all {len(arms)} arms began with {next(iter(of))}."]
    return [
        f"Not held fixed: what the arms began with. {'; '.join(f'{_listed(names)}: {name}' for name, names in of.items())}."
    ]


def _checkpoint(origin: dict[str, Any]) -> str:
    return f"step {origin['step']} of run {origin['fingerprint'][:16]} (weights `{origin['weights'][:12]}`)"


def _listed(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
