"""All settings of a run, as frozen dataclasses that are checked when they are made.

A file in `configs/` edits the ConfigDict (`ml_collections`) that `default_config()` makes from
these classes, the command line edits it further, and `from_config_dict` turns it back into
dataclasses. Only this package knows ConfigDicts.
"""

from bltjax.config.data import DataConfig, SourceConfig
from bltjax.config.model import (
    DTYPES,
    BLTConfig,
    CrossAttentionConfig,
    EntropyModelConfig,
    HashConfig,
    InitConfig,
    TokenModelConfig,
    TransformerConfig,
)
from bltjax.config.patching import PatchingConfig
from bltjax.config.reading import (
    FREE_FIELDS,
    config_path,
    default_config,
    differences,
    from_config_dict,
    read_config,
    to_config_dict,
    to_dict,
)
from bltjax.config.run import (
    ALL_STAGES,
    STAGES,
    TRAINING,
    EvaluationConfig,
    MeshConfig,
    RunConfig,
    TokenizerConfig,
)
from bltjax.config.training import OptimizerConfig, ProfileConfig, TrainingConfig

__all__ = [
    "ALL_STAGES",
    "DTYPES",
    "FREE_FIELDS",
    "STAGES",
    "TRAINING",
    "BLTConfig",
    "CrossAttentionConfig",
    "DataConfig",
    "EntropyModelConfig",
    "EvaluationConfig",
    "HashConfig",
    "InitConfig",
    "MeshConfig",
    "OptimizerConfig",
    "PatchingConfig",
    "ProfileConfig",
    "RunConfig",
    "SourceConfig",
    "TokenModelConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "TransformerConfig",
    "config_path",
    "default_config",
    "differences",
    "from_config_dict",
    "read_config",
    "to_config_dict",
    "to_dict",
]
