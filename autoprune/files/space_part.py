"""The section `space` of a job file: which groups are searched, and how far."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from autoprune.errors import InputError, did_you_mean
from autoprune.files.job_values import Sparsity, Step
from autoprune.files.part import Part
from autoprune.matrices import PRECISIONS, sparse_pattern
from autoprune.structure import SHAPELESS

GRANULARITIES = ("auto", "channel", "head", "kv_group", "neuron", "block", "bits", "weight")
ALLOWED = f"{', '.join(GRANULARITIES)} or a pattern such as '2:4'"
ZEROS = ("nonzeros", "effective_macs")
"""Costs that a search of weights tells beside the usual ones."""


class OverridePart(Part):
    """What `space.overrides` may change for the groups that a glob matches."""

    multiple_of: Step | None = None
    max_sparsity: Sparsity | None = None


class SpacePart(Part):
    """Which groups are searched: `granularity` auto takes all structured kinds that the model has.

    `weight` searches which weights of each matrix are zero, a pattern such as "2:4" which matrices hold two of
    every four; one of the two, alone or listed with structured kinds. `max_sparsity` binds structured kinds alone, an
    override's all that it names. Widths come in steps of `multiple_of` channels, `auto` leaves at most 32 a group.
    `bits` are the precisions that weights may have: [32, 8] lets each be stored in 8 bits; granularity `bits` implies
    it.
    """

    granularity: str | tuple[str, ...] = "auto"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    multiple_of: Step = "auto"
    max_sparsity: Sparsity = 0.9
    overrides: dict[str, OverridePart] = Field(default_factory=dict)
    bits: tuple[int, ...] | None = None

    @field_validator("bits")
    @classmethod
    def _known_bits(cls, given: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if given is not None and sorted(given) != sorted(PRECISIONS):
            raise ValueError(f"bits are {list(PRECISIONS)}, or not said, not {list(given)}")
        return given

    @model_validator(mode="after")
    def _known_granularity(self) -> SpacePart:
        try:
            sparse_pattern(self.kinds)
        except InputError as error:
            raise ValueError(str(error).removeprefix("space.")) from error
        for word in self.kinds:
            if word not in GRANULARITIES and ":" not in word:
                raise ValueError(f"unknown granularity {word!r}; {did_you_mean(word, GRANULARITIES)}")
        if len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"granularity names a kind twice: {', '.join(self.kinds)}")
        if "auto" in self.kinds and len(self.kinds) > 1:
            raise ValueError("granularity: auto stands alone, it is all structured kinds that the model has")
        if not self.kinds:
            raise ValueError(f"granularity lists nothing; allowed: {ALLOWED}")
        return self

    @field_validator("granularity", mode="before")
    @classmethod
    def _words(cls, value: object) -> object:
        for word in value if isinstance(value, list | tuple) else [value]:
            if isinstance(word, int) and not isinstance(word, bool):
                n, m = divmod(word, 60)  # YAML 1.1 reads 2:4 as a number to the base of 60
                raise ValueError(f"{word} is no granularity; YAML reads {n}:{m} so unless it is quoted: '{n}:{m}'")
            if not isinstance(word, str):
                raise ValueError(f"{word!r} is no granularity; allowed: {ALLOWED}")
        return value

    @property
    def kinds(self) -> tuple[str, ...]:
        return (self.granularity,) if isinstance(self.granularity, str) else self.granularity

    @property
    def shapeless(self) -> bool:
        """Whether what is searched leaves every shape: zeros and bits alone."""
        return all(word in SHAPELESS or ":" in word for word in self.kinds)

    @property
    def counted(self) -> tuple[str, ...]:
        """Costs that a search of this space tells whether it limits them or not, beside those that all tell."""
        return () if sparse_pattern(self.kinds) is None else ZEROS
