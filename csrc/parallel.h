// Work items on torch's threads. Which thread takes which item is left open, so results must not depend on it.
#ifndef SAD_PARALLEL_H
#define SAD_PARALLEL_H

#include <stdint.h>

#include "sparse_decode.h"

// null in a forked child too: the parent's threads do not exist there
extern "C" sad_parallel_for sad_threads(void);

namespace {

// Calls work(item) for 0 .. items - 1 on up to `threads` threads; returns when all are done.
template <class Work>
void each(int64_t threads, int64_t items, Work work) {
  sad_parallel_for parallel_for = sad_threads();
  if (threads > items) threads = items;
  if (threads <= 1 || !parallel_for) {
    for (int64_t item = 0; item < items; item++) work(item);
    return;
  }
  struct Queue {
    int64_t next, items;
    Work* work;
  } queue = {0, items, &work};
  parallel_for(
      0, threads, 1,
      [](int64_t, int64_t, void* context) {
        Queue* q = static_cast<Queue*>(context);
        // items are taken one by one: threads are not equally fast, items not equally long
        for (int64_t item; (item = __atomic_fetch_add(&q->next, 1, __ATOMIC_RELAXED)) < q->items;) (*q->work)(item);
      },
      &queue);
}

}  // namespace
#endif
