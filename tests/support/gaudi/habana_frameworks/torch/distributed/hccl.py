"""HCCL takes its card when it is imported."""

import os

from habana_frameworks import calls

calls.append(("hccl", os.environ.get("HLS_MODULE_ID"), os.environ.get("LOCAL_RANK")))
