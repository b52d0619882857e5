/* SmolLM2-135M-Instruct (Q4_1), the real model of the tests: $CHOIR_TEST_MODEL or the model cache. */
#pragma once

/* Its path; without it says so and skips the cmocka test. */
const char *smol_model(void);
