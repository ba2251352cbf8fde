"""All settings of a run, as frozen dataclasses that are checked when they are made.

A file in `configs/` edits the ConfigDict (`ml_collections`) that `default_config()` makes from
these classes, the command line edits it further, and `from_config_dict` turns it back into
dataclasses. Only this package knows ConfigDicts.
"""

# `as` tells type checkers that these names are public here.
from bltjax.config.chat import ChatConfig as ChatConfig
from bltjax.config.data import DataConfig as DataConfig
from bltjax.config.data import SourceConfig as SourceConfig
from bltjax.config.diffusion import DiffusionConfig as DiffusionConfig
from bltjax.config.lora import LoRAConfig as LoRAConfig
from bltjax.config.model import DTYPES as DTYPES
from bltjax.config.model import BLTConfig as BLTConfig
from bltjax.config.model import CrossAttentionConfig as CrossAttentionConfig
from bltjax.config.model import EntropyModelConfig as EntropyModelConfig
from bltjax.config.model import HashConfig as HashConfig
from bltjax.config.model import InitConfig as InitConfig
from bltjax.config.model import TokenModelConfig as TokenModelConfig
from bltjax.config.model import TransformerConfig as TransformerConfig
from bltjax.config.names import settings as settings
from bltjax.config.patching import PatchingConfig as PatchingConfig
from bltjax.config.reading import FREE_FIELDS as FREE_FIELDS
from bltjax.config.reading import config_path as config_path
from bltjax.config.reading import default_config as default_config
from bltjax.config.reading import differences as differences
from bltjax.config.reading import from_config_dict as from_config_dict
from bltjax.config.reading import read_config as read_config
from bltjax.config.reading import to_config_dict as to_config_dict
from bltjax.config.reading import to_dict as to_dict
from bltjax.config.reading import to_model_dict as to_model_dict
from bltjax.config.run import ALL_STAGES as ALL_STAGES
from bltjax.config.run import STAGES as STAGES
from bltjax.config.run import TRAINING as TRAINING
from bltjax.config.run import EvaluationConfig as EvaluationConfig
from bltjax.config.run import MeshConfig as MeshConfig
from bltjax.config.run import RunConfig as RunConfig
from bltjax.config.run import TokenizerConfig as TokenizerConfig
from bltjax.config.teacher import TeacherConfig as TeacherConfig
from bltjax.config.training import OptimizerConfig as OptimizerConfig
from bltjax.config.training import ProfileConfig as ProfileConfig
from bltjax.config.training import TrainingConfig as TrainingConfig
