"""Choosing leaves by path, walking them, counting their bytes: the bottom layer."""

from jaxcompress.tree._paths import by_path as by_path
from jaxcompress.tree._paths import is_array_like as is_array_like
from jaxcompress.tree._paths import leaves_with_paths as leaves_with_paths
from jaxcompress.tree._paths import map_arrays_with_path as map_arrays_with_path
from jaxcompress.tree._paths import map_with_path as map_with_path
from jaxcompress.tree._paths import path_string as path_string
from jaxcompress.tree._paths import require_distinct as require_distinct
from jaxcompress.tree._select import Where as Where
from jaxcompress.tree._select import all_of as all_of
from jaxcompress.tree._select import any_of as any_of
from jaxcompress.tree._select import glob as glob
from jaxcompress.tree._select import is_weight as is_weight
from jaxcompress.tree._select import none_of as none_of
from jaxcompress.tree._select import select as select
from jaxcompress.tree._size import nbytes as nbytes
from jaxcompress.tree._size import size as size
