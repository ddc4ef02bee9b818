/* Loops that measure how fast a core multiplies and adds at best. */
#ifndef GRAPHOPT_LOOPS_H_
#define GRAPHOPT_LOOPS_H_

#include "graphopt.h"

typedef struct {
  const char* arithmetic; /* NULL behind the last one */
  void (*run)(const void* activations, const void* weights, void* sums, int32_t turns);
  uint64_t operations; /* of a turn */
} graphopt_loop;

extern const graphopt_loop graphopt_loops[];

#endif /* GRAPHOPT_LOOPS_H_ */
