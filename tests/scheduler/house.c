#include "tests/scheduler/house.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

void open_house_with(house *h, uint32_t n_pages, choir_scheduler_options o, uint64_t budget,
                     uint64_t floor)
{
    *h = (house){.bytes_before = choir_memory_bytes(CHOIR_MEM_ADAPTERS)};
    toy_folder_create(&h->folder);
    toy_disk_create(&h->disk, 1);
    choir_adapters_options a = toy_options(&h->maker, &h->disk, floor > 0 ? floor : budget);
    a.most_bytes = budget;
    assert_int_equal(choir_adapters_create(&a, &h->pool), CHOIR_OK);
    h->w.engine = simulated_engine_create(n_pages);
    h->w.engine->adapters = h->pool;
    h->w.engine->adapter_floor = floor;
    const choir_step_engine step = simulated_step_engine(h->w.engine);
    o.manual = true;
    assert_int_equal(choir_scheduler_create(&step, &o, &h->w.scheduler), CHOIR_OK);
}

void open_house(house *h)
{
    open_house_with(h, 128, small_options(), ROOM, 0);
}

void assert_no_claims(const house *h)
{
    choir_adapters_stats t;
    choir_adapters_get_stats(h->pool, &t);
    assert_int_equal(t.n_pins, 0);
    assert_int_equal(t.n_claims, 0);
}

void close_house(house *h)
{
    assert_quiet(&h->w);
    assert_no_claims(h);
    while (choir_adapters_work(h->pool))
        ;
    end_world(&h->w);
    choir_adapters_destroy(h->pool);
    assert_int_equal(h->maker.n_live, 0);
    toy_folder_destroy(&h->folder);
    assert_int_equal(choir_memory_bytes(CHOIR_MEM_ADAPTERS), h->bytes_before);
}

void add(house *h, const char *name, toy_spec spec)
{
    char path[128];
    if (spec.bytes == 0) spec.bytes = SIZE;
    toy_write(&h->folder, name, &spec);
    snprintf(path, sizeof path, "%s/%s", h->folder.path, name);
    const choir_adapter_load what = {.name = name, .path = path};
    if (choir_adapters_register(h->pool, &what) != CHOIR_OK) fail_msg("%s", choir_error_message());
}

choir_status load(house *h, const char *name)
{
    char path[128];
    snprintf(path, sizeof path, "%s/%s", h->folder.path, name);
    const choir_adapter_load what = {.name = name, .path = path};
    return choir_adapters_load(h->pool, &what, NULL);
}

void turn(house *h)
{
    choir_adapters_work(h->pool);
    choir_scheduler_tick(h->w.scheduler);
}

void finish_one(house *h, choir_stream *stream, answer *a)
{
    for (int i = 0; !drain(stream, a); i++) {
        assert_true(i < 5000);
        turn(h);
    }
    choir_stream_release(stream);
}

answer ask(house *h, const choir_request *r)
{
    answer a = {0};
    finish_one(h, submit(&h->w, r), &a);
    return a;
}

answer alone(const choir_request *r, const toy_spec *specs)
{
    house h;
    choir_scheduler_options o = small_options();
    o.prefix_cache = false;
    open_house_with(&h, 128, o, ROOM, 0);
    for (uint32_t i = 0; i < r->n_adapters; i++) add(&h, r->adapters[i].name, specs[i]);
    answer a = ask(&h, r);
    assert_int_equal(a.status, CHOIR_OK);
    close_house(&h);
    return a;
}

bool same(const answer *a, const answer *b)
{
    for (uint32_t i = 0; i < N_ANSWERS; i++)
        if (a->n[i] != b->n[i] ||
            memcmp(a->tokens[i], b->tokens[i], a->n[i] * sizeof(uint32_t)) != 0)
            return false;
    return true;
}
