"""Folds an adapter into its base."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from tunekit.errors import AdapterError
from tunekit.passes.base import Context, Outcome, Pass

if TYPE_CHECKING:
    from tunekit.artifacts import Artifact


class Merge(Pass):
    """Folds the adapter into its base: an ordinary model, no slower than the base.

    Layers of a quantized base are unpacked, merged and packed again in their own scheme.
    """

    kind: ClassVar[str] = "merge"
    accepts: ClassVar[frozenset[str]] = frozenset({"adapter"})
    produces: ClassVar[str | None] = "torch"

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the merged weights on disk; what follows in the chain computes from them."""
    base: str | None = None
    """Source of the base model, for an adapter that does not name its own."""

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        """Loads the base in fp32, merges and saves.

        Raises:
            AdapterError: the adapter names no base, or does not fit it.
        """
        from tunekit import families
        from tunekit.adapters import merge_adapter
        from tunekit.families.family import DTYPES

        source = self.base or artifact.base
        if source is None:
            raise AdapterError(
                "the adapter does not say which base it was trained on",
                where=artifact.source,
                hint="name it: merge: {base: ...}",
            )
        # How the base was opened for training is how it opens now.
        trained_on = artifact.lineage[0].settings.get("model", {}) if artifact.lineage else {}
        options = {
            key: trained_on[key] for key in ("revision", "variant", "allow_pickle") if key in trained_on
        }
        family = families.get(context.family)
        pipeline = family.load(source, **(options if self.base is None else {}))
        layers = merge_adapter(pipeline, family, artifact.source)
        if self.dtype != "fp32":
            pipeline.to(DTYPES[self.dtype])
        family.save(pipeline, context.folder)
        parameters = sum(parameter.numel() for parameter in family.denoiser(pipeline).parameters())
        return Outcome(metrics={"parameters": parameters, "merged_layers": layers})


PASS = Merge
