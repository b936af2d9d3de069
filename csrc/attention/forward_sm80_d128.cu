#include "attention/forward_sm80.cuh"

template int almostgpt::attention_forward_sm80<128>(const AttentionInputs&, Heads, float*, const device::Card&, void*);
