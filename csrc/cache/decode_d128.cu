#include "cache/decode.cuh"

template int almostgpt::decode_workspace_sm80<128>(const DecodeInputs&, const device::Card&, DecodeWorkspace*);
template int almostgpt::decode_attention_sm80<128>(const DecodeInputs&, const DecodeScratch&, Heads, const device::Card&,
                                                  void*);
