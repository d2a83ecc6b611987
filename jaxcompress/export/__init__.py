"""Files: parameters, compressed or not, in the safetensors format."""

from jaxcompress.export._load import load as load
from jaxcompress.export._load import read_metadata as read_metadata
from jaxcompress.export._save import save as save
