#include "server/queue.h"

#include "base/memory.h"

#include <pthread.h>

struct choir_queue {
    pthread_mutex_t lock; /* guards everything below */
    pthread_cond_t filled;
    choir_node *first, *last;
    uint32_t n, max, n_waiting;
    bool closed;
};

choir_status choir_queue_create(uint32_t max, choir_queue **out)
{
    choir_queue *q = choir_calloc(CHOIR_MEM_SERVER, 1, sizeof *q);
    if (q == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a queue");
    q->max = max;
    pthread_mutex_init(&q->lock, NULL);
    pthread_cond_init(&q->filled, NULL);
    *out = q;
    return CHOIR_OK;
}

void choir_queue_destroy(choir_queue *q)
{
    if (q == NULL) return;
    pthread_cond_destroy(&q->filled);
    pthread_mutex_destroy(&q->lock);
    choir_free(q);
}

bool choir_queue_try_push(choir_queue *q, choir_node *node)
{
    node->next = NULL;
    pthread_mutex_lock(&q->lock);
    bool taken = !q->closed && (q->max == 0 || q->n < q->max);
    if (taken) {
        if (q->last != NULL)
            q->last->next = node;
        else
            q->first = node;
        q->last = node;
        q->n++;
    }
    bool wake = taken && q->n_waiting != 0;
    pthread_mutex_unlock(&q->lock);
    if (wake) pthread_cond_signal(&q->filled);
    return taken;
}

/* Returns with the lock held. */
static void await_nodes(choir_queue *q)
{
    pthread_mutex_lock(&q->lock);
    while (q->first == NULL && !q->closed) {
        q->n_waiting++;
        pthread_cond_wait(&q->filled, &q->lock);
        q->n_waiting--;
    }
}

choir_node *choir_queue_pop(choir_queue *q)
{
    await_nodes(q);
    choir_node *node = q->first;
    if (node != NULL) {
        q->first = node->next;
        if (q->first == NULL) q->last = NULL;
        q->n--;
    }
    pthread_mutex_unlock(&q->lock);
    return node;
}

choir_node *choir_queue_pop_all(choir_queue *q)
{
    await_nodes(q);
    choir_node *chain = q->first;
    q->first = q->last = NULL;
    q->n = 0;
    pthread_mutex_unlock(&q->lock);
    return chain;
}

void choir_queue_close(choir_queue *q)
{
    pthread_mutex_lock(&q->lock);
    q->closed = true;
    pthread_mutex_unlock(&q->lock);
    pthread_cond_broadcast(&q->filled);
}
