-- SPDX-License-Identifier: Apache-2.0
-- Which guard listens in the rooms of the account, and what is known of these rooms.
-- KEYS: the lease; the last token that was given out; the rows of rooms; the rows by the version that changed them; the
-- last version. ARGV[1]: JSON {guard, milliseconds, hears, known, token, rows}.
-- With rows, the holder of the lease writes them: the answer is the new version, -1 if its token is not the current one.
-- Without rows, the lease is got or renewed (for 0 milliseconds: given up). The answer is JSON {token, hears, version,
-- rows}: 0 if another guard has the lease, whether the holder hears the rooms, and the rows that changed since a version.

local request = cjson.decode(ARGV[1])
local lease, fence, rows, order, version = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]

if request.rows then
  local holder = redis.call('HGET', lease, 'guard')
  if holder ~= request.guard or redis.call('HGET', lease, 'token') ~= request.token then return -1 end
  for name, text in pairs(request.rows) do
    if text == cjson.null then redis.call('HDEL', rows, name) else redis.call('HSET', rows, name, text) end
    redis.call('ZADD', order, redis.call('INCR', version), name)
  end
  for _, key in ipairs({fence, rows, order, version}) do redis.call('EXPIRE', key, KEPT) end
  return tonumber(redis.call('GET', version)) or 0
end

local holder = redis.call('HGET', lease, 'guard')
if request.milliseconds == 0 then
  if holder == request.guard then redis.call('DEL', lease) end
  holder = 'nobody'
elseif not holder then
  redis.call('HSET', lease, 'guard', request.guard, 'token', redis.call('INCR', fence))
  redis.call('EXPIRE', fence, KEPT)
  holder = request.guard
end
if holder == request.guard then
  redis.call('HSET', lease, 'hears', request.hears and '1' or '0')
  redis.call('PEXPIRE', lease, request.milliseconds)
end

local changed, last = {}, tonumber(redis.call('GET', version)) or 0
local since = request.known > last and 0 or request.known
for place, name in ipairs(redis.call('ZRANGEBYSCORE', order, '(' .. string.format('%.0f', since), '+inf')) do
  changed[place] = {name, redis.call('HGET', rows, name)}
end
local token = holder == request.guard and redis.call('HGET', lease, 'token') or '0'
return cjson.encode({token, redis.call('HGET', lease, 'hears') == '1', last, changed})
