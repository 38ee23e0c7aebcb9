"""Models among the inputs of a job, loaded."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel

from cascade.architecture import Architecture
from cascade.family.extension import child_config, teacher_config
from cascade.family.workplace import Workplace
from cascade.models.decoder import decoder_of
from cascade.models.folders import load_folder, load_folder_config


def the_model(place: Workplace, name: str) -> PreTrainedModel:
    """An input for inference; on long rows with the RoPE settings that the job has for it."""
    section, trust = place.job.section, place.job.options.trust_remote_code
    if name == "parent" and "teacher_rope" in section:
        config = teacher_config(load_folder_config(place.input(name), trust), section["teacher_rope"])
    elif name == "distilled" and "rope" in section:
        config = child_config(load_folder_config(place.input(name), trust), section["rope"])
    else:
        config = None
    return read_only(place, name, config)


def read_only(place: Workplace, name: str, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """An input checkpoint for inference; config: in place of its own."""
    return load_folder(
        place.input(name),
        place.working_dtype,
        place.device,
        trust_remote_code=place.job.options.trust_remote_code,
        config=config,
    )


def shape_of(model: PreTrainedModel) -> Architecture:
    """The architecture of a loaded model."""
    return decoder_of(model).architecture
