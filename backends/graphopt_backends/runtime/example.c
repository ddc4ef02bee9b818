/* Runs the compiled model once on zeros. Build and start, in this folder:
 *
 *   @COMMAND@ && ./example
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "graphopt.h"

int main(void) {
  const graphopt_description* made = graphopt_describe();
  char message[512];
  graphopt_model* model = graphopt_open(@WEIGHTS@, 1, message, sizeof message); /* 1: threads */
  if (!model) {
    fprintf(stderr, "%s\n", message);
    return 1;
  }

@INPUTS@  const void* inputs[] = {@INPUT_NAMES@};
@OUTPUTS@  void* outputs[] = {@OUTPUT_NAMES@};

  graphopt_run(model, inputs, outputs);

  for (int i = 0; i < made->output_count; ++i) {
    const graphopt_tensor* output = &made->outputs[i];
    printf("%s %s:", output->dtype, output->name);
    if (strcmp(output->dtype, "float32") == 0)
      for (uint64_t k = 0; k < output->bytes / 4 && k < 10; ++k) printf(" %g", ((const float*)outputs[i])[k]);
    printf("\n");
  }
  graphopt_close(model);
  return 0;
}
