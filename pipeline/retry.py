"""Failed samples that can be read now, listed as new shards behind the others: `build_shards.py --retry-failed`.

The list of a shard's keys is published once, before the shard is built: a killed build, or one beside this one, goes on
with the same list, so no sample comes twice. Shards and keys that are there stay as they are.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from pipeline.config import BuildConfig
from pipeline.dataset import Dataset
from pipeline.images import index_zips
from pipeline.manifest import known_failures, retried
from pipeline.schema import Retried, StoreSpec, retried_path
from pipeline.storage import Storage
from pipeline.worker import ShardWorker


def list_readable(config: BuildConfig, dataset: Dataset, spec: StoreSpec) -> tuple[int, int]:
    """Look at the images of all samples that failed; returns how many that are, and how many can be read now.

    Raises:
        OSError: for what is no fact of the images.
    """
    storage, worker = Storage(config.store), ShardWorker(config, spec)
    zips = index_zips(config.image_roots, (record.image for record in dataset.records))
    later = retried(storage, spec)
    listed = {key for keys in later.values() for key in keys}
    failures = [failure for failure in known_failures(storage) if failure.kind != "features"]
    failed = [failure.key for failure in failures if failure.key not in listed]

    def can_be_read(key: str) -> bool:
        record = dataset.records[int(key)]
        places = [index.get(record.image or "") for index in zips]
        return worker.decode(key, record.image, record.conversations, places).fault is None

    with ThreadPoolExecutor(config.decode_threads) as pool:
        readable = [key for key, fine in zip(failed, pool.map(can_be_read, failed), strict=True) if fine]
    left = readable
    while left:
        listed = {key for keys in later.values() for key in keys}
        left = [key for key in left if key not in listed]
        for first in range(0, len(left), spec.shard_size):
            number, shard = spec.shards + len(later), Retried(keys=tuple(left[first : first + spec.shard_size]))
            if not storage.publish_bytes(retried_path(number), shard.model_dump_json().encode()):
                later = retried(storage, spec)  # a build beside this one was first, perhaps with some of these
                break
            later[number] = shard.keys
        else:
            break
    return len(failed), len(readable)
