#include "attention/forward_sm90.cuh"

template int almostgpt::attention_forward_sm90<128>(const AttentionInputs&, Heads, float*, const device::Card&, void*);
