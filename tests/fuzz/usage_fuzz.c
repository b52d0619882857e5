/* Routes out of a file that anybody may have written: shares of tokens, or a sentence. */
#include "tune/usage.h"

#include "base/base.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static char path[64];

static void remove_file(void)
{
    unlink(path);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static choir_model_config config = {.n_layers = 2, .n_experts = 3};
    float usage[6];
    if (path[0] == '\0') {
        snprintf(path, sizeof path, "/tmp/usage_fuzz-%ld.jsonl", (long)getpid());
        atexit(remove_file);
        config.layers[1] = CHOIR_LAYER_MOE;
    }
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    CHOIR_ASSERT(fd >= 0 && write(fd, data, bytes) == (ssize_t)bytes);
    close(fd);
    if (choir_usage_read(path, &config, usage) != CHOIR_OK) return 0;
    for (int i = 0; i < 6; i++) CHOIR_ASSERT(usage[i] >= 0 && usage[i] <= (i < 3 ? 0 : 1));
    return 0;
}
