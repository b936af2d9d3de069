#include "attention/backward_sm80.cuh"

template int almostgpt::attention_backward_sm80<64>(const AttentionInputs&, const AttentionGradients&,
                                                    const AttentionScratch&, const BackwardPlan&,
                                                    const device::Card&, void*);
