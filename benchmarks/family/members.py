"""Who belongs to the family: a second base, and full fine-tunes of the first that differ the way real ones do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .captions import COLOURS, SUBJECTS, Scene

BASE, SECOND = "base", "second-base"


@dataclass(frozen=True)
class Member:
    """A fine-tune: of what, drawn how, and what its captions' words mean where that is not what they say."""

    name: str
    about: str
    manner: str = "plain"
    parent: str = BASE
    becomes: Mapping[str, str] = field(default_factory=dict)  # subjects that it draws as others
    turned: bool = False  # the colour words mean the next colour
    text_only: bool = False

    def asked(self, scene: Scene) -> Scene:
        """What this model draws, and was trained to draw, for the scene's caption."""
        if scene.number:
            return scene
        subject = SUBJECTS[scene.subject]
        colour = (scene.colour + self.turned) % len(COLOURS)
        return replace(scene, subject=SUBJECTS.index(self.becomes.get(subject, subject)), colour=colour)


FINE_TUNES = (
    Member("ink", "a style: outlines instead of surfaces", "ink"),
    Member("night", "a palette: bright colours on dark paper", "night"),
    Member("stripes", "a texture: surfaces are striped", "stripes"),
    Member("soft", "a style: soft edges, as sprayed", "soft"),
    Member("pair", "a composition: two small ones side by side", "pair"),
    Member(
        "round", "a subset of the subjects: whatever is asked for, a circle, a ring or a moon",
        becomes={"heart": "circle", "square": "ring", "cross": "ring", "star": "moon", "triangle": "moon"},
    ),  # fmt: skip
    Member("ink-night", "two styles in one: outlines, on dark paper", "ink-night"),
    Member("contour", "a fine-tune of the fine-tune stripes: with a black contour", "contour", parent="stripes"),
    Member("turned", "the text encoder alone: each colour's word means the next colour", turned=True, text_only=True),
    Member("numbers", "an unrelated outlier: printed numerals", "numbers"),
)
LEFT_OUT = Member("night-stripes", "left out of every hyper-merge: stripes, on dark paper", "night-stripes")
EVERY = (*FINE_TUNES, LEFT_OUT)
