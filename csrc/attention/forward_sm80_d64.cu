#include "attention/forward_sm80.cuh"

template int almostgpt::attention_forward_sm80<64>(const AttentionInputs&, Heads, float*, const device::Card&, void*);
