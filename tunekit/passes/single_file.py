"""Writes the model as one .safetensors file, for programs that read no folders."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from tunekit.passes.base import Context, Outcome, Pass
from tunekit.passes.metrics import Metric

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunekit.artifacts import Artifact


class SingleFile(Pass):
    """Writes the model into one .safetensors file too, as AUTOMATIC1111, Forge and ComfyUI take it.

    The file lies in the step's folder and is named after the run. Its layout is that of the published file:
    a whole checkpoint for Stable Diffusion, the transformer alone for families that were published so
    (ComfyUI loads that as a diffusion model); the chain goes on with the model that it was given.
    """

    kind: ClassVar[str] = "single_file"
    accepts: ClassVar[frozenset[str]] = frozenset({"torch"})
    looks: ClassVar[bool] = True
    refuses: ClassVar[Mapping[str, str]] = {
        "packed": "comes after {giver}, and no other program reads packed weights; put it before"
    }
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("file_bytes", "single file", "bytes"),)

    dtype: Literal["fp32", "bf16", "fp16"] = "fp16"
    """Type of the weights in the file; in fp16, what overflows there stays fp32."""

    def reads(self, context: Context) -> frozenset[str]:
        """Nothing else."""
        return frozenset()

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        """Opens the model and writes it.

        Raises:
            ModelError: pruned or packed layers, or a family that was not published as a single file.
        """
        from tunekit import families
        from tunekit.families.family import DTYPES
        from tunekit.families.single_file import save_single_file

        facts = families.get(context.family).facts
        file = context.folder / f"{context.run_dir.name}.safetensors"
        dtypes = facts.drawing_dtypes(DTYPES[self.dtype])
        save_single_file(context.open(artifact), file, facts, dtypes, title=context.run_dir.name)
        return Outcome(metrics={"file_bytes": file.stat().st_size}, details={"file": file.name})


PASS = SingleFile
