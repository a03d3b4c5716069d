"""Cerebras ModelZoo's LLaVA models: configurations, state files and trees, read and written."""

from lapilli.checkpoint.cerebras.config_from import FromCerebras as FromCerebras
from lapilli.checkpoint.cerebras.config_from import from_cerebras_config as from_cerebras_config
from lapilli.checkpoint.cerebras.config_to import to_cerebras_config as to_cerebras_config
from lapilli.checkpoint.cerebras.config_to import version_of as version_of
from lapilli.checkpoint.cerebras.names import MODELS as MODELS
from lapilli.checkpoint.cerebras.names import model_name as model_name
from lapilli.checkpoint.cerebras.places import encoder_folder as encoder_folder
from lapilli.checkpoint.cerebras.places import tokenizer_folder as tokenizer_folder
from lapilli.checkpoint.cerebras.read import Opened as Opened
from lapilli.checkpoint.cerebras.read import is_cerebras as is_cerebras
from lapilli.checkpoint.cerebras.read import open_cerebras as open_cerebras
from lapilli.checkpoint.cerebras.write import WrittenCerebras as WrittenCerebras
from lapilli.checkpoint.cerebras.write import write_cerebras as write_cerebras
