/* What the runtime and the code that is generated for a model know of each other. */
#ifndef GRAPHOPT_COMPILED_H_
#define GRAPHOPT_COMPILED_H_

#include <stdatomic.h>

#include "graphopt.h"

/* ---- generated for each model */

extern const graphopt_description graphopt_this;
extern const uint8_t* const graphopt_embedded_weights; /* NULL where they lie in a file */
extern const int graphopt_samples_apart; /* they do not mix, and lie along the first axis of all inputs and outputs */

/* Walks through all steps, as one of several tasks. */
void graphopt_enter(
    _Atomic(const void*)* inputs, _Atomic(void*)* outputs, const void* weights, void* workspace, void* self,
    int32_t task, int32_t tasks);

/* A loop that measures how fast a core multiplies and adds at best. */
typedef struct {
  const char* arithmetic; /* NULL behind the last one */
  void (*run)(const void* activations, const void* weights, void* sums, int32_t turns);
  uint64_t operations; /* of a turn */
} graphopt_loop;

extern const graphopt_loop graphopt_loops[];

/* ---- called by what was generated, with the `self` that it was given */

/* True if this thread is to compute a part of a step. */
int32_t graphopt_take(void* self, int32_t step, int32_t part);

/* Between two steps that one thread takes together. */
void graphopt_between(void* self, int32_t step);

/* A part of a step is done. */
void graphopt_done(void* self, int32_t step);

/* Waits until all parts of a step are done: the next one needs what others did. */
void graphopt_behind(void* self, int32_t step, int32_t parts);

#endif /* GRAPHOPT_COMPILED_H_ */
