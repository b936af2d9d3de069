"""From text to batches, one file a step:

corpora    documents: kinds of text, from files of many formats or the Hugging Face hub
filters    which of them are kept: lengths, duplicates, normalisation
tokenizer  text <-> token ids
prepare    documents -> tokens -> a folder of shards, split into train and val
pieces     the part of it that many processes share (workers), put together in order (encoding)
token_runs, journal    what of it is on the disk, whatever kills the process
shards     the file format of a run of tokens
dataset    a prepared folder, opened and verified
loader     shards -> batches (ids, targets, document borders) in a seeded, resumable order
"""
