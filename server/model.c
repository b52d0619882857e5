#include "server/server.h"

choir_server_model choir_server_model_of(const char *name, const choir_engine *engine,
                                         choir_scheduler *scheduler)
{
    choir_step_engine step = choir_step_engine_of((choir_engine *)engine);
    return (choir_server_model){
        .name = name,
        .config = choir_engine_config(engine),
        .tokenizer = choir_engine_tokenizer(engine),
        .chat_template = choir_engine_chat_template(engine),
        .scheduler = scheduler,
        .digest = step.digest,
    };
}
