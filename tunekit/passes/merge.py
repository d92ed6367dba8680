"""Folds an adapter into its base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from tunekit.artifacts import open_artifact
from tunekit.config import PathText
from tunekit.errors import TunekitError
from tunekit.passes.base import Context, Outcome, Pass, Start
from tunekit.passes.metrics import PARAMETERS, SIZE, Metric
from tunekit.resources import Source

if TYPE_CHECKING:
    from tunekit.artifacts import Artifact


class Merge(Pass):
    """Folds the adapter into its base: an ordinary model, no slower than the base.

    Layers of a quantized base are unpacked, merged and packed again in their own scheme.
    """

    kind: ClassVar[str] = "merge"
    accepts: ClassVar[frozenset[str]] = frozenset({"adapter"})
    produces: ClassVar[str | None] = "torch"
    metrics: ClassVar[tuple[Metric, ...]] = (
        PARAMETERS,
        SIZE,
        Metric("merged_layers", "merged layers", "count"),
    )

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the merged weights on disk; what follows in the chain computes from them. Of a model in fp16,
    what overflows there stays fp32; the family knows it."""
    base: PathText | None = None
    """Source of the base model, for an adapter that does not name its own."""

    def gives(self) -> frozenset[str]:
        """Nothing: the merged model is what was trained, and nothing of it has to heal."""
        return frozenset()

    def reads(self, context: Context) -> frozenset[str]:
        """Nothing else."""
        return frozenset()

    def objection(self, start: Start, earlier: Sequence[Pass]) -> str | None:
        """Finds an adapter that nobody names the base of, and a base that is not there."""
        if self.base is None:
            return (
                None
                if start.based
                else "needs the base of the adapter, which does not name it; write merge: {base: ...}"
            )
        try:
            open_artifact(self.base)
        except TunekitError as error:
            return f"cannot take its base: {error.message}"
        return None

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        """Loads the base in fp32, merges and saves.

        Raises:
            ArtifactError: the adapter names no base.
            AdapterError: it does not fit the base.
            ModelError: a merged weight is NaN or infinite, in its type.
        """
        from tunekit import families
        from tunekit.adapters import merge_adapter
        from tunekit.families.family import DTYPES
        from tunekit.families.loading import cast, check_finite

        family = families.get(context.family)
        source = Source(self.base) if self.base else artifact.model_source
        pipeline = family.load(source)
        layers = merge_adapter(pipeline, family, artifact.source, allow_pickle=source.allow_pickle)
        if self.dtype != "fp32":
            cast(pipeline, family.facts, family.facts.drawing_dtypes(DTYPES[self.dtype]))
        check_finite(pipeline, f"{artifact.source}, merged in {self.dtype}")
        family.save(pipeline, context.folder)
        parameters = sum(parameter.numel() for parameter in family.denoiser(pipeline).parameters())
        return Outcome(metrics={"parameters": parameters, "merged_layers": layers})


PASS = Merge
