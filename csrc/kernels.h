// The operations as one instruction set has them: SAD_NAMED(encode) is encode_avx2 where SAD_ISA is avx2.
#ifndef SAD_KERNELS_H
#define SAD_KERNELS_H

#include "sparse_decode.h"

#define SAD_JOIN2(op, isa) sad_##op##_##isa
#define SAD_JOIN(op, isa) SAD_JOIN2(op, isa)
#define SAD_NAMED(op) SAD_JOIN(op, SAD_ISA)

constexpr int SAD_MOST_DIM = 1024, SAD_MOST_GROUP = 256;

// One query head as the scan wants it: logit = (2 * dot - offset) * factor * slope + mean_logit.
struct sad_weights {
  // plane k of word w holds the weights of the 4 channels in bits 2k of that word's bytes
  alignas(64) int8_t of[SAD_MOST_DIM];
  int32_t offset;
  float slope, mean_logit;
};

typedef int (*sad_operation)(const sad_call*);
typedef int (*sad_multiplication)(const sad_product*);

#define SAD_DECLARE(isa)                                                                                     \
  int sad_fit_##isa(const sad_call*), sad_encode_##isa(const sad_call*), sad_score_##isa(const sad_call*);   \
  int sad_select_##isa(const sad_call*), sad_attend_##isa(const sad_call*), sad_step_##isa(const sad_call*); \
  int sad_read_##isa(const sad_call*), sad_pack_##isa(const sad_call*), sad_verify_##isa(const sad_call*);   \
  int sad_multiply_##isa(const sad_product*);                                                                \
  void sad_weigh_##isa(const sad_call*, int64_t unit, sad_weights*);

SAD_DECLARE(portable)
SAD_DECLARE(avx2)
SAD_DECLARE(avx512)

#endif
