"""From text to batches, one file a step:

corpora    documents: the standard library, tiny Shakespeare, local text files
tokenizer  text <-> token ids
prepare    documents -> tokens -> a folder of shards, split into train and val
shards     the file format of a run of tokens
dataset    a prepared folder, opened and verified
loader     shards -> batches (ids, targets, document borders) in a seeded, resumable order
"""
