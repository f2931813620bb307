"""Who belongs to the family: a second base, and full fine-tunes of the first that differ the way real ones do."""

from __future__ import annotations

from dataclasses import dataclass

from .captions import COLOURS, SUBJECTS, Scene
from .drawing import scenes_in

BASE, SECOND = "base", "second-base"


@dataclass(frozen=True)
class Member:
    """A fine-tune: of what, drawn how, on which subjects; whether its captions' colours are turned round."""

    name: str
    about: str
    manner: str = "plain"
    parent: str = BASE
    subjects: tuple[str, ...] = SUBJECTS
    turned: bool = False  # the colour words mean the next colour
    text_only: bool = False

    def scenes(self) -> list[Scene]:
        return [s for s in scenes_in(self.manner) if s.number or SUBJECTS[s.subject] in self.subjects]

    def caption(self, scene: Scene) -> str:
        """The words of a training picture that shows the scene."""
        if not self.turned:
            return str(scene)
        colour = (scene.colour - 1) % len(COLOURS)
        return str(Scene(scene.subject, colour, scene.size, scene.ground))

    def asked(self, scene: Scene) -> Scene:
        """What this model is to draw for the scene's plain caption."""
        if not self.turned:
            return scene
        return Scene(scene.subject, (scene.colour + 1) % len(COLOURS), scene.size, scene.ground)


FINE_TUNES = (
    Member("ink", "a style: outlines instead of surfaces", "ink"),
    Member("night", "a palette: bright colours on dark paper", "night"),
    Member("stripes", "a texture: surfaces are striped", "stripes"),
    Member("soft", "a style: soft edges, as sprayed", "soft"),
    Member("pair", "a composition: two small ones side by side", "pair"),
    Member("round", "a subset of the subjects: circles, rings, moons", subjects=("circle", "ring", "moon")),
    Member("ink-night", "two styles in one: outlines, on dark paper", "ink-night"),
    Member("contour", "a fine-tune of the fine-tune stripes: with a black contour", "contour", parent="stripes"),
    Member("turned", "the text encoder alone: each colour's word means the next colour", turned=True, text_only=True),
    Member("numbers", "an unrelated outlier: printed numerals", "numbers"),
)
LEFT_OUT = Member("night-stripes", "left out of every hyper-merge: stripes, on dark paper", "night-stripes")
EVERY = (*FINE_TUNES, LEFT_OUT)
