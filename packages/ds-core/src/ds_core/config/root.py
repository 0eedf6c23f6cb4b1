"""The whole config of a run: ds-core's own keys and the sections of installed packages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    Field,
    PrivateAttr,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from ds_core.config import formats
from ds_core.config.formats import NumberFormats
from ds_core.config.section import Auto, Only, Section
from ds_core.config.sections import (
    Bf16Section,
    CheckpointSection,
    CompileSection,
    DataTypesSection,
    DtypeName,
    Fp16Section,
    MetricsSection,
    OptimizerSection,
    SchedulerSection,
    TorchAutocastSection,
)

#: Where a value comes from: the file, a default, arithmetic on other values, or "auto".
Origin = Literal["file", "default", "derived", "auto"]


class Config(Section):
    """A config that is complete and consistent. `ds_core.config.load` makes it.

    Keys are attributes, and so are the sections of installed packages: `config.zero_optimization`,
    or `config.section("zero_optimization")` where the package may be missing.
    """

    train_batch_size: int = Field(gt=0, description="Samples per optimizer step over all ranks.")
    train_micro_batch_size_per_gpu: int = Field(
        gt=0, description="Samples per forward on one rank."
    )
    gradient_accumulation_steps: int = Field(
        gt=0, description="Forwards and backwards per optimizer step."
    )

    optimizer: OptimizerSection | None = Field(
        default=None, description="The optimizer to build; null: initialize() is given one."
    )
    scheduler: SchedulerSection | None = Field(
        default=None,
        description="The learning-rate schedule to build; null: none, or one is given.",
    )
    gradient_clipping: Annotated[float, Auto()] = Field(
        default=1.0,
        ge=0,
        description="Largest global L2 norm of the gradients; 0 does not clip. The default is that "
        'of DeepSpeed\'s code (its documentation says 0). "auto" is the default.',
    )

    fp16: Fp16Section = Field(default_factory=Fp16Section, description="fp16 training.")
    bf16: Bf16Section = Field(
        default_factory=Bf16Section, description="bf16 training; also accepted as bfloat16."
    )
    torch_autocast: TorchAutocastSection = Field(
        default_factory=TorchAutocastSection, description="torch.autocast around forward."
    )
    data_types: DataTypesSection = Field(
        default_factory=DataTypesSection, description="Number formats of gradients."
    )

    communication_data_type: DtypeName | None = Field(
        default=None,
        description="Format in which gradients travel between ranks, at every stage; null: the one "
        "they accumulate in.",
    )
    gradient_allreduce_op: Literal["mean", "sum"] = Field(
        default="mean",
        description="Whether gradients are averaged over data-parallel ranks or summed. A sum is "
        "had by weighting every loss with the number of ranks.",
    )
    prescale_gradients: bool = Field(
        default=False,
        description="Makes no difference: gradients are always divided before they are summed, in "
        "the pass that takes them over, so that no sum overflows.",
    )
    gradient_predivide_factor: Annotated[
        float,
        Only(
            1.0,
            because="gradients are divided by all the ranks before they are summed, so no sum "
            "overflows; against underflow in fp16 there is the loss scale: remove the key",
        ),
    ] = Field(
        default=1.0, description="Only 1.0: the whole division comes before the sum over ranks."
    )
    sparse_gradients: bool = Field(
        default=False,
        description="Whether gradients of nn.Embedding(sparse=True) travel, and reach the "
        "optimizer, as rows and indices. At stage 0 only; else they become dense.",
    )
    managed_gradient_accumulation: bool = Field(
        default=True,
        description="Whether micro-batches are counted. If not, each engine.step() ends a step, "
        "and losses are divided by gradient_accumulation_steps all the same.",
    )
    compile: CompileSection = Field(
        default_factory=CompileSection, description="torch.compile of the model's blocks."
    )

    zero_allow_untested_optimizer: bool = Field(
        default=False,
        description="Makes no difference: any optimizer that treats elements alike is sharded.",
    )
    zero_force_ds_cpu_optimizer: bool = Field(
        default=True, description="Makes no difference: any optimizer steps on the CPU."
    )

    seed: int | None = Field(
        default=None,
        ge=0,
        le=2**32 - 1,
        description="Seeds Python, torch and the data order; null: left alone.",
    )
    dataloader_drop_last: bool = Field(
        default=False,
        description="Whether the loader that initialize() builds drops an uneven last batch.",
    )
    checkpoint: CheckpointSection = Field(
        default_factory=CheckpointSection, description="How checkpoints are written."
    )

    steps_per_print: int | None = Field(
        default=None,
        gt=0,
        description="Optimizer steps between two progress lines, which then are on unless "
        "progress is false; null: the observer decides.",
    )
    wall_clock_breakdown: bool = Field(
        default=False, description="Whether forward, backward and step are timed apart."
    )
    memory_breakdown: bool = Field(
        default=False,
        description="Whether memory after forward, backward and step is recorded. Shown by "
        "progress, written by metrics and dashboards; with none of them set, progress is on.",
    )
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = Field(
        default=None,
        description="Level of the loggers of ds-core and its packages; null: left alone.",
    )
    metrics: MetricsSection = Field(
        default_factory=MetricsSection, description="Where scalars are written."
    )
    progress: bool = Field(
        default=False, description="Whether rank 0 shows progress on the terminal."
    )

    _sections: dict[str, Section] = PrivateAttr(default_factory=dict)
    _origins: dict[str, Origin] = PrivateAttr(default_factory=dict)

    def section(self, name: str) -> Section | None:
        """The parsed section of that name, its defaults if the file has none.

        Returns None if the package that owns it is not installed.
        """
        if name in type(self).model_fields:
            own = getattr(self, name)
            return own if isinstance(own, Section) else None
        return self._sections.get(name)

    def sections(self) -> Mapping[str, Section]:
        """The sections of installed packages by top-level key."""
        return dict(self._sections)

    def origin(self, path: str) -> Origin:
        """Where the value at a key path such as "fp16.loss_scale" comes from."""
        return self._origins.get(path, "default")

    def resolve_precision(self, *, bf16_is_fast: bool, fp16_is_fast: bool = False) -> NumberFormats:
        """The number formats of the run on a device, with every "auto" decided.

        Args:
            bf16_is_fast: whether the device computes bf16 faster than fp32.
            fp16_is_fast: whether it computes fp16 faster than fp32.
        """
        return formats.resolve(
            self.bf16,
            self.fp16,
            self.torch_autocast,
            self.data_types,
            bf16_is_fast=bf16_is_fast,
            fp16_is_fast=fp16_is_fast,
        )

    @model_serializer(mode="wrap")
    def _dump_sections(
        self, handler: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> dict[str, Any]:
        dumped: dict[str, Any] = handler(self)
        for name, section in self._sections.items():
            dumped[name] = section.model_dump(
                mode=info.mode,
                exclude_defaults=info.exclude_defaults,
                exclude_unset=info.exclude_unset,
                exclude_none=info.exclude_none,
            )
        return dumped

    if not TYPE_CHECKING:
        # Hidden from type checkers, so that a misspelt attribute stays a type error.
        def __getattr__(self, name: str) -> Any:
            private = object.__getattribute__(self, "__pydantic_private__") or {}
            sections = private.get("_sections") or {}
            if name in sections:
                return sections[name]
            return super().__getattr__(name)
