"""LLaVA-format data in, a feature store of frozen CLIP hidden states out (Ray Data).

`build_shards.py` is the command. The data flow through the other files in this order:

    config         settings, checked
    dataset        JSON files -> records in a shuffled order; image folders and archives -> bytes
    plan           records -> numbered shards: what is left to do, what it costs
    cluster        into Ray, which gives each shard to a worker
    worker         one shard, with the four files below
    encoder        image bytes -> pixels -> hidden states of CLIP
    codec          hidden states -> payloads, and back
    shard          payloads -> one tar per column
    manifest       the commit record of each shard, and the table of them all

`schema` says what a store holds, `storage` reads and writes it on a disk or on S3. `verify_shards.py` and
`inspect_shards.py` look into a finished store; `demo_data.py` draws data to try all this on.
"""
