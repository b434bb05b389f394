// Chooses the instruction set once, by what the CPU says or by SPARSE_ATTENTION_DECODER_ISA.
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "kernels.h"

namespace {

struct Isa {
  const char* name;
  sad_operation fit, encode, score, select, attend, step, read, pack, verify;
  sad_multiplication multiply;
};

#define SAD_ISA_ROW(isa) \
  {#isa, sad_fit_##isa, sad_encode_##isa, sad_score_##isa, sad_select_##isa, sad_attend_##isa, sad_step_##isa, \
   sad_read_##isa, sad_pack_##isa, sad_verify_##isa, sad_multiply_##isa}

// best first
const Isa ISAS[] = {
#ifdef SAD_X86
    SAD_ISA_ROW(avx512),
    SAD_ISA_ROW(avx2),
#endif
    SAD_ISA_ROW(portable),
};

bool cpu_has([[maybe_unused]] const Isa& isa) {
#ifdef SAD_X86
  if (!strcmp(isa.name, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
  if (!strcmp(isa.name, "avx2"))
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // and f16c, which clang 14 cannot ask for
#endif
  return true;
}

const Isa* best() {
  for (const Isa& isa : ISAS)
    if (cpu_has(isa)) return &isa;
  return nullptr;
}

const Isa* in_use = best();
sad_parallel_for threads = nullptr;

// torch's threads stay behind when the process forks
void forget_threads() { threads = nullptr; }

// scratch of one thread, kept from call to call
struct Arena {
  void* block = nullptr;
  size_t size = 0;

  ~Arena() { free(block); }
};
thread_local Arena arena;

}  // namespace

extern "C" {

sad_parallel_for sad_threads(void) { return __atomic_load_n(&threads, __ATOMIC_RELAXED); }

void* sad_scratch(size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  // to the byte, so that an overrun is seen
  free(arena.block);
  return posix_memalign(&arena.block, 64, bytes ? bytes : 1) ? arena.block = nullptr : arena.block;
#endif
  if (bytes > arena.size) {
    const size_t page = size_t(2) << 20, size = (bytes + bytes / 2 + page - 1) / page * page;
    free(arena.block);
    arena.size = 0;
    arena.block = nullptr;
    if (posix_memalign(&arena.block, page, size) != 0) return arena.block = nullptr;
    arena.size = size;
#ifdef MADV_HUGEPAGE
    madvise(arena.block, size, MADV_HUGEPAGE);
#endif
  }
  return arena.block;
}

void sad_use_threads(sad_parallel_for parallel_for) {
  static const int registered = pthread_atfork(nullptr, nullptr, forget_threads);
  (void)registered;
  __atomic_store_n(&threads, parallel_for, __ATOMIC_RELAXED);
}

const char* sad_isa(void) { return in_use->name; }

int sad_use_isa(const char* name) {
  for (const Isa& isa : ISAS)
    if (!strcmp(isa.name, name) && cpu_has(isa)) {
      in_use = &isa;
      return 1;
    }
  return 0;
}

int64_t sad_call_size(void) { return int64_t(sizeof(sad_call)); }
int64_t sad_product_size(void) { return int64_t(sizeof(sad_product)); }

int sad_fit(const sad_call* call) { return in_use->fit(call); }
int sad_encode(const sad_call* call) { return in_use->encode(call); }
int sad_score(const sad_call* call) { return in_use->score(call); }
int sad_select(const sad_call* call) { return in_use->select(call); }
int sad_attend(const sad_call* call) { return in_use->attend(call); }
int sad_step(const sad_call* call) { return in_use->step(call); }
int sad_read(const sad_call* call) { return in_use->read(call); }
int sad_pack(const sad_call* call) { return in_use->pack(call); }
int sad_verify(const sad_call* call) { return in_use->verify(call); }
int sad_multiply(const sad_product* product) { return in_use->multiply(product); }
}
