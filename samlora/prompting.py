"""How prompts are drawn from a reference, as plain data: rows of systems hold it, options change it."""

from dataclasses import dataclass

PROMPTS = ("no", "box", "full_box", "pt", "pt_box", "any")


@dataclass(frozen=True)
class Prompting:
    """How prompts are drawn from the reference while a system with prompts trains, and when it is measured.

    prompt: "no": none; "box": the object's box; "full_box": the whole image; "pt": points; "pt_box": both; "any": box,
    pt or pt_box by chance. box_jitter: most pixels of the model's input by which each side of a box is moved.
    sample_num: points on the object; negative_num: beside it. point_strategy: how points after the first are chosen:
    "random", "entropy" (where the answer to the first is least sure), "distance" (farthest from the points so far) or
    "centre" (the middle-most first, then as "distance").
    max_objects: of an image and step. parts: each connected part of a class is an object of its own.
    """

    prompt: str = "box"
    box_jitter: int = 0
    sample_num: int = 1
    negative_num: int = 0
    point_strategy: str = "random"
    max_objects: int = 1
    parts: bool = False
