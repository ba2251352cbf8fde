"""Every setting of a run, as frozen dataclasses, and all validation of them.

`ml_collections` stops at the edge: a file in `configs/` edits the ConfigDict that
`default_config()` makes from these classes, the command line edits it further, and
`from_config_dict` turns it back into dataclasses, checking names, types and values.
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
from bltjax.config.patching import ENTROPY_RULES, PATCHING_RULES, PatchingConfig
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
    "ENTROPY_RULES",
    "FREE_FIELDS",
    "PATCHING_RULES",
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
