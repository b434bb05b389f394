// The C ABI of the CPU kernels: one struct of plain numbers and pointers, one function per operation.
//
// src/sparse_attention_decoder/kernels/reference.py defines what each operation computes; the
// layouts are those of its docstrings. Strides count elements, the last axis is contiguous.
#ifndef SPARSE_DECODE_H
#define SPARSE_DECODE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// A cache of SAD_INT8 or SAD_INT4 is packed: rotated channels in whole steps, two to a byte in four bits (the even one in
// the low bits, both plus 8), and a scale a token; its strides count bytes. Queries are of the first three.
// fit, encode and pack take the packed tokens alone; attend and step read the whole ones too.
enum sad_dtype { SAD_FLOAT32 = 0, SAD_BFLOAT16 = 1, SAD_FLOAT16 = 2, SAD_INT8 = 3, SAD_INT4 = 4 };

// what an operation answers
enum sad_status { SAD_OK = 0, SAD_NO_MEMORY = -1 };

// Every operation reads the fields it needs; kernels/cpu/library.py fills them in this order.
typedef struct {
  // sizes: B, Hkv, G = Hq / Hkv, D, Dv, and how many threads may work
  int64_t batch, kv_heads, group, dim, value_dim, threads;
  // dtypes, see sad_dtype
  int64_t cache_type, query_type;
  // query [B, Hq, D]; output [B, Hq, Dv] in the query's dtype and lse [B, Hq] float32, both contiguous
  const void* query;
  int64_t query_row, query_head;
  void* output;
  float* lse;
  // keys [B, Hkv, T, D], values [B, Hkv, T, Dv] of `length` tokens
  void* keys;
  int64_t key_row, key_head, key_token;
  void* values;
  int64_t value_row, value_head, value_token;
  int64_t length;
  // the token to append, [B, Hkv, D] and [B, Hkv, Dv] contiguous, in the query's dtype, or null: it becomes the last of
  // `length`; step codes it where `count` is 1, not where it is 0
  const void* new_key;
  const void* new_value;
  // codes [B, Hkv, N/16, W, 16, 4] uint8 and factors [B, Hkv, N] float16; token `start` is the next to be coded
  uint8_t* codes;
  int64_t code_row, code_head;
  uint16_t* factors;
  int64_t factor_row, factor_head;
  int64_t start, count;
  // statistics [B, Hkv, D] float32, contiguous
  float* mean;
  float* deviation;
  // rotation of D channels: scale, D signs, (D / power)^2 cosines, power being the largest of two in D
  const float* rotation;
  // tokens to read: [B, near_count] int64 that every head reads, which of them count (or null)
  const int64_t* near;
  const uint8_t* near_valid;
  int64_t near_count;
  // the middle: positions low .. high - 1; [B, high - low], which of them count (or null)
  int64_t low, high;
  const uint8_t* middle;
  // select: tokens at least, tokens at most (negative: any number), group share above which a token is taken (0: off)
  int64_t floor, cap;
  double threshold, scaling;
  // logits [B, Hkv, G, high - low] float32 and near_lse [B, Hkv, G] float32: score writes, select reads
  float* logits;
  const float* near_lse;
  // chosen tokens [B, Hkv, tokens_room] int64, counts [B, Hkv] int64, missing mass [B, Hkv] float32
  int64_t* tokens;
  int64_t tokens_room;
  int64_t* counts;
  float* missing;
  // the same for each query head [B, Hkv, G] float32, or null
  float* head_missing;
  // attend: which of `tokens` count [B, Hkv, tokens_room], or null for all
  const uint8_t* tokens_valid;
  // a packed cache: scales [B, Hkv, T] float16, and the rotation of Dv channels
  uint16_t* key_scales;
  int64_t key_scale_row, key_scale_head;
  uint16_t* value_scales;
  int64_t value_scale_row, value_scale_head;
  const float* value_rotation;
  // its newest tokens, from `whole_from` on, which are kept as they came, in the query's dtype:
  // keys [B, Hkv, length - whole_from, D], values [B, Hkv, length - whole_from, Dv]; none where whole_from is `length`
  int64_t whole_from;
  void* whole_keys;
  int64_t whole_key_row, whole_key_head, whole_key_token;
  void* whole_values;
  int64_t whole_value_row, whole_value_head, whole_value_token;
  // step: 1 to read, beside the tokens above the threshold, one of the rest for every `threshold` of attention; and what is
  // added to the logits of chosen tokens for it [B, Hkv, tokens_room] float32, or null
  int64_t sampled;
  float* log_weights;
} sad_call;

// A matrix [rows, columns] of `type`, float32, bfloat16 or float16, and `count` rows to multiply it with.
// columns is a multiple of 8. kernels/cpu/products.py fills it.
typedef struct {
  int64_t count, rows, columns, threads, type;
  // input [count, columns] and output [count, rows], contiguous; matrix rows are `matrix_row` elements apart
  const void* input;
  const void* matrix;
  int64_t matrix_row;
  // [rows], or null
  const void* bias;
  void* output;
} sad_product;

// torch_parallel_for of libtorch_cpu: runs work(begin, end, context) on torch's own threads
typedef int32_t (*sad_parallel_for)(int64_t begin, int64_t end, int64_t grain, void (*work)(int64_t, int64_t, void*),
                                    void* context);

#pragma GCC visibility push(default)

void sad_use_threads(sad_parallel_for parallel_for);
// the name of the instruction set in use: avx512, avx2 or portable
const char* sad_isa(void);
// force one; 1 where this machine and build have it
int sad_use_isa(const char* name);
int64_t sad_call_size(void);
int64_t sad_product_size(void);

// moments of the rotated keys of one row: keys of row 0, tokens 0 .. count - 1 -> mean, deviation [Hkv, D]
int sad_fit(const sad_call* call);
// keys [B, Hkv, count, D] -> codes and factors of tokens start .. start + count - 1
int sad_encode(const sad_call* call);
// new_key [B, Hkv, count, D] contiguous, in the query's dtype -> keys and key_scales of tokens start .. start + count - 1
int sad_pack(const sad_call* call);
// query, codes -> logits
int sad_score(const sad_call* call);
// logits, near_lse -> tokens, counts, missing
int sad_select(const sad_call* call);
// append (where there is a new token), then query, keys and values at tokens -> output, lse; tokens null: all of
// `length`, middle marking those that count
int sad_attend(const sad_call* call);
// query [B, Hkv, count, G, D], `group` being count * G: `count` queries of the newest tokens, each seeing what is before it
// and itself -> output and lse in the same order; of a cache that is not packed
int sad_verify(const sad_call* call);
// append (where there is a new token), score, select and attend in one call; answers the largest of the counts
int sad_step(const sad_call* call);
// input matrix^T + bias -> output, each row as it would be alone, bit for bit
int sad_multiply(const sad_product* product);
// reads `count` bytes of `codes` in order, their XOR into counts[0]: the bandwidth that a scan is measured against
int sad_read(const sad_call* call);

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif
#endif
