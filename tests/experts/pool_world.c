#include "tests/experts/pool_world.h"

#include <string.h>

uint64_t fake_now;

static uint64_t read_clock(void *user)
{
    (void)user;
    return fake_now;
}

static world *made_in;
static void (*act_first)(world *w);

void before_making(void (*act)(world *w))
{
    act_first = act;
}

static choir_status make(void *maker, const choir_adapter_file *file, choir_adapter_made *made)
{
    void (*act)(world * w) = act_first;
    act_first = NULL;
    if (act != NULL) act(made_in);
    return toy_make(maker, file, made);
}

void open_pool(world *w, uint64_t budget)
{
    toy_disk_create(&w->disk, 1);
    choir_adapters_options o = toy_options(&w->maker, &w->disk, budget);
    o.make = make;
    made_in = w;
    o.folder = w->folder.path;
    assert_int_equal(choir_adapters_create(&o, &w->pool), CHOIR_OK);
}

void make_world(world *w, uint64_t budget)
{
    fake_now = 1000 * CHOIR_SECOND;
    choir_clock_replace(read_clock, NULL);
    *w = (world){0};
    toy_folder_create(&w->folder);
    open_pool(w, budget);
}

void assert_idle(const world *w)
{
    choir_adapters_stats t;
    choir_adapters_get_stats(w->pool, &t);
    assert_int_equal(t.n_pins, 0);
    assert_int_equal(t.n_claims, 0);
    assert_int_equal(t.n_loading, 0);
    assert_int_equal(t.held_bytes, w->maker.live_bytes);
    assert_true(t.held_bytes <= t.budget_bytes);
}

void end_world(world *w)
{
    while (choir_adapters_work(w->pool))
        ;
    assert_idle(w);
    choir_adapters_destroy(w->pool);
    assert_true(w->disk.closed);
    assert_int_equal(w->maker.n_live, 0);
    toy_folder_destroy(&w->folder);
    choir_clock_replace(NULL, NULL);
    assert_int_equal(choir_memory_bytes(CHOIR_MEM_ADAPTERS), 0);
}

toy_spec spec_of(uint64_t seed)
{
    return (toy_spec){.seed = seed, .bytes = SIZE};
}

choir_adapter_load place(const world *w, const char *name)
{
    static char path[128];
    snprintf(path, sizeof path, "%s/%s", w->folder.path, name);
    return (choir_adapter_load){.name = name, .path = path};
}

void add(world *w, const char *name, uint64_t seed)
{
    toy_spec spec = spec_of(seed);
    toy_write(&w->folder, name, &spec);
    choir_adapter_load what = place(w, name);
    if (choir_adapters_register(w->pool, &what) != CHOIR_OK) fail_msg("%s", choir_error_message());
}

void work(world *w)
{
    for (int i = 0; i < 20; i++) choir_adapters_work(w->pool);
}

choir_adapter_claim *claim(world *w, const char *name, int64_t urgency)
{
    choir_adapter_claim *c = calloc(1, sizeof *c);
    if (choir_adapters_claim(w->pool, name, urgency, c, NULL) != CHOIR_OK)
        fail_msg("%s", choir_error_message());
    return c;
}

bool pin(world *w, choir_adapter_claim *c)
{
    bool pinned;
    if (choir_adapters_pin(w->pool, c, 1, &pinned) != CHOIR_OK)
        fail_msg("%s", choir_error_message());
    return pinned;
}

void release(world *w, choir_adapter_claim *c)
{
    choir_adapters_release(w->pool, c, 1);
    choir_adapters_release(w->pool, c, 1);
    free(c);
}

uint64_t digest_of_seed(uint64_t seed)
{
    toy_spec spec = spec_of(seed);
    return toy_digest(&spec);
}

/* What runs with the claim is what the seed says. */
void assert_holds(const choir_adapter_claim *c, uint64_t seed)
{
    const toy_adapter *a = choir_adapter_claim_adapter(c);
    assert_int_equal(a->digest, digest_of_seed(seed));
    assert_int_equal(choir_adapter_claim_digest(c), a->digest);
}

choir_adapter_info info_of(world *w, const char *name)
{
    choir_adapter_info info;
    assert_int_equal(choir_adapters_find(w->pool, name, &info), CHOIR_OK);
    return info;
}

void says(const char *part)
{
    if (strstr(choir_error_message(), part) == NULL)
        fail_msg("'%s' does not say '%s'", choir_error_message(), part);
}
